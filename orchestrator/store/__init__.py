"""The store: artefacts, the only truth there is, in a folder or in an object store.

An artefact is its files, its `stage.json` and, written last, a marker with a digest of every file.
Whatever has no valid marker does not exist.
"""

from orchestrator.store.base import MARKER as MARKER
from orchestrator.store.base import STAGE as STAGE
from orchestrator.store.base import Artefacts as Artefacts
from orchestrator.store.base import CorruptArtefact as CorruptArtefact
from orchestrator.store.base import Store as Store
from orchestrator.store.base import StoreUnreachable as StoreUnreachable
from orchestrator.store.base import file_digest as file_digest
from orchestrator.store.opening import is_url as is_url
from orchestrator.store.opening import open_store as open_store
