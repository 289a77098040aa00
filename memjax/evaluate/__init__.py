"""Experiments that print a table, a picture and result.json, and the invented world that they are run on."""
