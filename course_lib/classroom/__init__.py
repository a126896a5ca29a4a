"""What the notebooks stand on: releasing them to students, and drawing what the engine measured.

Nothing here is needed to serve a model. Modules import Jupyter's packages and matplotlib, which
come with the `labs` extra, so this package is imported by notebooks and by the `course` command
only.
"""
