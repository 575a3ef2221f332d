"""Damaged and hostile artifacts, made by the thousand: what reads them must refuse by name and stay small."""
