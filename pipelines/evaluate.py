"""FID, Inception Score, precision and recall, FD-DINOv2, or a Fréchet distance in any teacher's space, of a pipeline.

Installed as `pixelrepa-evaluate`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.evaluate import cli


if __name__ == "__main__":
    cli()
