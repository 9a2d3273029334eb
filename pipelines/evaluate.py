"""Measure FID, Inception Score, precision, recall and FD-DINOv2 of a pipeline or of images.

Same as the installed command `pixelrepa-evaluate`; for `accelerate launch`, which takes a script.
"""

from pixelrepa_diffusers.commands.evaluate import cli


if __name__ == "__main__":
    cli()
