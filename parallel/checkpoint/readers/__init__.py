"""One reader a format; each knows every name, shape and dtype before it reads any data."""
