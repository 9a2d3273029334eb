"""Does aligning with a teacher draw images towards what the teacher finds typical? The probe of PixelREPA (arXiv 2603.14366).

Installed as `pixelrepa-probe-alignment`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.probe_alignment import cli


if __name__ == "__main__":
    cli()
