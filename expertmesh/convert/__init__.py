"""A checkpoint written anew in another precision: `formats` (what each is on disk), `shards` (which tensor goes where,
before any is read), `files` (written whole or not at all), `journal` (what is done), `run` (all of it, and on from
where it was interrupted), `verify` (what is there, against the source)."""
