"""Compute the reference statistics that metrics compare with.

Same as the installed command `pixelrepa-prepare-reference`; for `accelerate launch`, which takes a script.
"""

from pixelrepa_diffusers.commands.prepare_reference import cli


if __name__ == "__main__":
    cli()
