"""Parameters, FLOPs and traffic of models, counted and by formula."""
