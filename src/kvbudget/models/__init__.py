"""Models: load them, know the geometry of their cache and the rotation of their keys, refuse what cannot be served."""

from kvbudget.models.fingerprint import fingerprint
from kvbudget.models.geometry import CacheGeometry, LayerGeometry
from kvbudget.models.load import load, load_config
from kvbudget.models.rotation import Rotation, rotation_of, rotations_of
from kvbudget.models.support import check_supported

__all__ = [
    "CacheGeometry",
    "LayerGeometry",
    "Rotation",
    "check_supported",
    "fingerprint",
    "load",
    "load_config",
    "rotation_of",
    "rotations_of",
]
