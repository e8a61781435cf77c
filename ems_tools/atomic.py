"""placeholder"""
def write_atomic(path, data):
    path.write_bytes(data)
