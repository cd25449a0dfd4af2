"""One rank of a trainer as a process of its own: python -m tests.flows.rank_process STORE …"""

import argparse
from pathlib import Path

from hotload.clients.publish import ShardPublisher, Store, read_copy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("served", type=Path, help="the checkpoint that is served")
    parser.add_argument("target", type=Path, help="the checkpoint of this version")
    parser.add_argument("version", type=int)
    parser.add_argument("rank", type=int)
    parser.add_argument("--attempt", type=int)
    asked = parser.parse_args()
    served = read_copy(asked.served)
    publisher = ShardPublisher(
        Store(asked.store), "run", asked.version, asked.rank, 2, served, attempt=asked.attempt
    )
    with publisher:
        print(publisher.attempt, flush=True)
        for file in publisher.share:
            publisher.put(file, asked.target / file)
        publisher.flush()
        print("put", flush=True)
        if input() == "commit":
            print(publisher.commit(), flush=True)


if __name__ == "__main__":
    main()
