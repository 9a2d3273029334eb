"""Store a data set once at training resolution; the same as the installed command `pixelrepa-prepare-dataset`."""

from pixelrepa_diffusers.commands.prepare_dataset import cli


if __name__ == "__main__":
    cli()
