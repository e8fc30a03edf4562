"""One frozen tree of settings: defaults < TOML file < environment < `--section.key value`.

Environment variables are FARFLUNG_SECTION__KEY. Every field says what it does; docs/config.md lists them all.
"""

# ruff: noqa: F403

from farflung.config.coordination import *
from farflung.config.embedded import *
from farflung.config.files import *
from farflung.config.idle import IdleSection as IdleSection
from farflung.config.learning import *
from farflung.config.machines import *
from farflung.config.section import *
from farflung.config.tree import *
