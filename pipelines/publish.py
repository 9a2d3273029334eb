"""Publish a saved pipeline and its model card on the Hub, in one commit.

Same as the installed command `pixelrepa-publish`.
"""

from pixelrepa_diffusers.commands.publish import cli


if __name__ == "__main__":
    cli()
