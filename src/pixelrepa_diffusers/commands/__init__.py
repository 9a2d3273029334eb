"""Implementation of the console commands: one module each, with `main(args)` for Python and `cli()` for the shell."""
