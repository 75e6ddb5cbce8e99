"""MoEfication: trained feed-forward networks as mixtures of small experts (Zhang et al. 2022, arXiv
2110.01786)."""
