"""Store a data set once at training resolution, to be read back by memory map without decoding.

Installed as `pixelrepa-prepare-dataset`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.prepare_dataset import cli


if __name__ == "__main__":
    cli()
