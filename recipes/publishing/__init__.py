"""Publishing: the folder that goes to the Hub, its model card, and what must not be in it."""
