"""The plan's flat tables, the cost model, and the compiled ops that walk them."""
