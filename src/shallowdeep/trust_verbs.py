"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations
