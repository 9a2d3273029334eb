"""The installed command `pixelrepa-evaluate` as a script, which `accelerate launch` takes."""

from pixelrepa_diffusers.commands.evaluate import cli


if __name__ == "__main__":
    cli()
