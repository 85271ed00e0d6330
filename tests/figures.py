"""What tests of pages compare: the data of figures, however they came."""

import base64

import numpy as np


def plain(part):
    """Write figure data with lists for packed arrays, floats to six digits, and no names of elements."""
    if isinstance(part, dict) and "bdata" in part:
        values = np.frombuffer(base64.b64decode(part["bdata"]), part["dtype"])
        shape = [int(one) for one in str(part.get("shape", len(values))).split(",")]
        return plain(values.reshape(shape).tolist())
    if isinstance(part, dict):
        # "_xlength" and such are notes of Plotly's own.
        return {key: plain(one) for key, one in part.items() if key != "uid" and not key.startswith("_")}
    if isinstance(part, list | tuple):
        return [plain(one) for one in part]
    if isinstance(part, float):
        return None if part != part else float(f"{part:.6g}")
    return float(part) if isinstance(part, int) and not isinstance(part, bool) else part
