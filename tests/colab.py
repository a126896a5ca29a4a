"""What Colab's image of August 2026 has of the packages that the notebooks stand on."""

VERSIONS = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "numpy": "2.1.0",
    "pandas": "2.2.2",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
}
