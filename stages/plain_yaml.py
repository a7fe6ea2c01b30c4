"""Refuse YAML that exhausts the stack or the memory of whoever loads it: nested without end, or grown by aliases of aliases."""

import yaml

DEEPEST = 100  # levels of lists and mappings
MOST_NODES = 100_000  # with every alias written out


def require_bounded(text: str) -> None:
    """Read the events of a document, which takes no stack, and count its nodes.

    Raises:
        yaml.YAMLError: it is no YAML, is nested too deeply, has too many nodes, or refers to itself.
    """
    sizes: dict[str | None, int] = {}  # anchor -> nodes
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and nodes so far of every list and mapping that has not ended

    def add(nodes: int) -> None:
        anchor, count = open_nodes[-1]
        if count + nodes > MOST_NODES:
            raise yaml.YAMLError(f"found more than {MOST_NODES:,} values with its aliases written out, wanted at most that")
        open_nodes[-1] = anchor, count + nodes

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) > DEEPEST:
                raise yaml.YAMLError(f"found lists or mappings in more than {DEEPEST} levels, wanted at most that")
            open_nodes.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = open_nodes.pop()
            sizes[anchor] = count
            add(count)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
            add(1)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"found the alias {event.anchor!r} of what has not ended or is not there")
            add(sizes[event.anchor])
