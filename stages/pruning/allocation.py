"""How sparse each matrix is."""


def uniform(names: list[str], sparsity: float) -> dict[str, float]:
    """Every matrix as sparse as the whole: name -> fraction of zeros."""
    return dict.fromkeys(names, sparsity)


ALLOCATIONS = {"uniform": uniform}
