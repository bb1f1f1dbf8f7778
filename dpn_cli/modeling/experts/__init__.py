"""The experts at work: a file per kind, which says of a batch at a site which token goes where."""
