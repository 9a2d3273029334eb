"""PixelREPA for the Hugging Face ecosystem."""
