"""Verifiers of tests, in a file of their own: each of their worker processes imports it, and nothing else of ours."""


def even_length(response: str, gold: str) -> float:
    """One that a model of random weights satisfies now and then."""
    return float(len(response) % 2 == 0)
