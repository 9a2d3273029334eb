"""The installed command `pixelrepa-generate` as a script, which `accelerate launch` takes."""

from pixelrepa_diffusers.commands.generate import cli


if __name__ == "__main__":
    cli()
