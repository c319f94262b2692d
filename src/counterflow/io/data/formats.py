"""Names of the formats, for errors."""

ACCEPTED = (
    '"digits", a folder of MNIST-style IDX files (train-images-idx3-ubyte, gz or not), a folder of PNG or '
    "JPEG images, an IDX file, or a .npy, .npz, .csv, .parquet or other table"
)
CSV = "a CSV table with the same number of cells on every line"
IDX = "an IDX file of images"
IMAGE = "a PNG, JPEG, TIFF or WebP image"
NPY = "a NumPy .npy file"
NPZ = "a NumPy .npz file"
