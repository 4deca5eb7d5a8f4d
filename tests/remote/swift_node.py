"""One node of OpenStack Swift with its S3 API, in one process: ``swift_node.py FOLDER PORT USER SECRET REGION``.

Swift is meant to be run as four servers with three ring files and four configurations. Here all four are greenlets of
one process, which loads everything once and so answers within a second. It checks signatures and digests as Amazon's
does, and knows conditional writes and multipart uploads. It runs in an environment that has ``swift`` and
``keystonemiddleware``, and needs no memcached and no root.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import eventlet
import eventlet.wsgi
from swift.common.ring import RingBuilder
from swift.common.utils import eventlet_monkey_patch, set_swift_dir
from swift.common.wsgi import SwiftHttpProtocol, loadapp

BACKENDS = ("account", "container", "object")
MOST_CONNECTIONS = 1000

SWIFT = """
[swift-hash]
swift_hash_path_prefix = a
swift_hash_path_suffix = b
[storage-policy:0]
name = one
default = yes
[swift-constraints]
max_file_size = 5368709122
"""

BACKEND = """
[DEFAULT]
swift_dir = {folder}/etc
devices = {folder}/srv
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = """
[DEFAULT]
swift_dir = {folder}/etc
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats bulk s3api tempauth copy slo dlo symlink proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
# Nobody listens there: nothing is remembered, so nothing that is read is old.
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = {region}
# A fifth and a tenth of Amazon's, so that parts and pages take little.
min_segment_size = 1048576
max_bucket_listing = 100
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
[filter:dlo]
use = egg:swift#dlo
[filter:symlink]
use = egg:swift#symlink
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""


def write_ring(name: str, folder: Path, port: int) -> None:
    """Write the ring file of one device, which says where the server of this name listens."""
    ring = RingBuilder(4, 1, 1)
    place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    ring.add_dev({"id": 0, "region": 1, "zone": 1, "device": "d1", "weight": 1.0, **place})
    ring.rebalance()
    ring.get_ring().save(str(folder / "etc" / f"{name}.ring.gz"))


def serve(config: Path, socket: eventlet.greenio.GreenSocket) -> eventlet.greenthread.GreenThread:
    """Serve what a configuration describes."""
    return eventlet.spawn(
        eventlet.wsgi.server,
        socket,
        loadapp(str(config)),
        logging.getLogger("requests"),
        protocol=SwiftHttpProtocol,
        custom_pool=eventlet.GreenPool(MOST_CONNECTIONS),
        capitalize_response_headers=False,
    )


def main(folder: Path, port: int, user: str, secret: str, region: str) -> None:
    """Make a node in an empty folder, with one user, and serve it for ever."""
    for name in ("etc", "srv/d1"):
        (folder / name).mkdir(parents=True)
    (folder / "etc" / "swift.conf").write_text(SWIFT)
    set_swift_dir(str(folder / "etc"))
    threads = []
    for name in BACKENDS:
        socket = eventlet.listen(("127.0.0.1", 0))
        write_ring(name, folder, socket.getsockname()[1])
        config = folder / "etc" / f"{name}.conf"
        config.write_text(BACKEND.format(folder=folder, name=name))
        threads.append(serve(config, socket))
    config = folder / "etc" / "proxy.conf"
    config.write_text(PROXY.format(folder=folder, user=user.replace(":", "_"), secret=secret, region=region))
    threads.append(serve(config, eventlet.listen(("127.0.0.1", port), backlog=256)))
    for thread in threads:
        thread.wait()


if __name__ == "__main__":
    eventlet_monkey_patch()
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
