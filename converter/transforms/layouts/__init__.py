"""Layouts: the same weights under the names and in the shapes of another program, a table a family, read both ways."""
