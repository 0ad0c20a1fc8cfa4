"""`python -m meshwright.clusters.agent`: the program of one node, see `node_run`.

It executes itself once more before it imports anything that takes time.
"""

from meshwright.clusters.carrying import make_room

__all__ = ["main"]


def main() -> None:
    """Runs one node."""
    make_room()
    from meshwright.clusters.node_run import main as run

    run()


if __name__ == "__main__":
    main()
