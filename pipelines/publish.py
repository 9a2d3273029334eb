"""A saved pipeline to the Hub, with its card, in one commit.

Installed as `pixelrepa-publish`; `--help` lists the flags.
"""

from pixelrepa_diffusers.commands.publish import cli


if __name__ == "__main__":
    cli()
