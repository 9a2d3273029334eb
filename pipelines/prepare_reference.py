"""The installed command `pixelrepa-prepare-reference` as a script, which `accelerate launch` takes."""

from pixelrepa_diffusers.commands.prepare_reference import cli


if __name__ == "__main__":
    cli()
