"""The installed command `pixelrepa-app` as a script."""

from pixelrepa_diffusers.commands.app import cli


if __name__ == "__main__":
    cli()
