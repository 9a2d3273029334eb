"""The installed command `pixelrepa-probe-alignment` as a script, which `accelerate launch` takes."""

from pixelrepa_diffusers.commands.probe_alignment import cli


if __name__ == "__main__":
    cli()
