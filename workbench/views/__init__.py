"""Panel views: each is a cell in JupyterLab and a page under ``panel serve``."""
