"""From a model to its families: which parameter slices have to disappear together.

In the order of the data: `trace` makes a graph of the model, `labels` is the algebra, `walk` and `rules`
say what each operator means in it, `propagation` runs a graph on labels, `assembly` makes families of
them, `proof` tries cuts on a copy, and `engines` calls these in order. `graph` stands beside that: it
makes a model that runs from its own traced graphs.
"""
