"""Other libraries' losses with their names and signatures, computed by fastcl's ops.

Each module stands in for one library and imports it; this one imports none. A class here is a subclass of the
library's own: what fastcl does not fuse, the library computes.
"""
