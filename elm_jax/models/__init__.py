"""The networks. They compute in the dtype of their input and know nothing of meshes, files or batches."""
