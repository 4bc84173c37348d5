"""What a family looks like to a person: a page, a model card, a picture, tables for the terminal."""
