"""How long a model takes: its operators timed one by one, and a cost made of these times."""
