"""What the console commands do: one module each, with `main(args)` for Python and `cli()` for the shell."""
