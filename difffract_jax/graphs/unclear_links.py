"""What a graph says of links in another tool's document that could not be taken as they stand (pure Python)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UnclearLinks:
    """Links of a document that were left out, or whose source it does not tell.

    Attributes:
        left_out: how many name a node that the document does not have.
        absent: the first such names.
        in_doubt: how many leave from a name that an error and another node share, and could leave from either.
        shared: the first such names.
        repeated: how many join two nodes that another link joins in the same direction already.
        pairs: the first such nodes, as in "a -> b".
    """

    left_out: int = 0
    absent: tuple[str, ...] = ()
    in_doubt: int = 0
    shared: tuple[str, ...] = ()
    repeated: int = 0
    pairs: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Returns what to tell of them, a sentence for each kind that there is."""
        sentences = []
        if self.left_out:
            absent = _listed(self.absent, "or")
            sentences.append(f"{_counted(self.left_out)} left out, as the document has no node {absent}.")
        if self.in_doubt:
            links = _counted(self.in_doubt, f" from {_listed(self.shared, 'and')}")
            sentences.append(
                f"{links} given to an error or to a feature, which share that name: two into one node go by the order "
                "of the nodes, one alone goes to the feature."
            )
        if self.repeated:
            kept = "is kept beside" if self.repeated == 1 else "are kept beside"
            links = "1 link" if self.repeated == 1 else f"{self.repeated} links"
            sentences.append(
                f"{links} between nodes that another link joins already ({', '.join(self.pairs)}) {kept} it, so that "
                "their weights add up."
            )
        return sentences


def _counted(links: int, which: str = "") -> str:
    return f"1 link{which} was" if links == 1 else f"{links} links{which} were"


def _listed(names: tuple[str, ...], word: str) -> str:
    return f" {word} ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} {word} {names[-1]}"
