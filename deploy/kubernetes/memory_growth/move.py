"""Give a memory cluster these shards: `move.py KNOWN REPLICAS ADDRESS...`, where KNOWN is a target that leads to it.

Every REPLICAS addresses in a row are a shard: s0, s1, ... Reads and writes go on meanwhile; cut off, it goes on where
it was when it is run again. The token and the authority to trust come from FOT_TOKEN_FILE and FOT_CA.
"""

import os
import sys
from pathlib import Path

from memory_service import Tls
from memory_service.cluster.caretaker import Caretaker
from memory_service.shards import Shard

known, replicas, addresses = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
rows = [tuple(addresses[first : first + replicas]) for first in range(0, len(addresses), replicas)]
shards = [Shard(f"s{number}", row) for number, row in enumerate(rows)]
ca = os.environ.get("FOT_CA")
with Caretaker.open(known, tls=Tls(ca=Path(ca)) if ca else None) as caretaker:
    sys.stdout.write(f"{caretaker.move(shards)}\n")
