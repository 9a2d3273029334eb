"""Measure how alignment pulls images towards the teacher (the probe of PixelREPA, arXiv 2603.14366).

Same as the installed command `pixelrepa-probe-alignment`; for `accelerate launch`, which takes a script.
"""

from pixelrepa_diffusers.commands.probe_alignment import cli


if __name__ == "__main__":
    cli()
