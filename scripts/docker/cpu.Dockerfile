# Inference on a CPU. Not built by the project's tests: no container engine was at hand.
#
#   docker build -f scripts/docker/cpu.Dockerfile -t ouroboros3d:cpu .
#   docker run --rm -v "$PWD:/data" ouroboros3d:cpu infer --input_img /data/photo.png --output_dir /data/outputs
#   docker run --rm -p 127.0.0.1:7860:7860 ouroboros3d:cpu app --host 0.0.0.0
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 OMP_WAIT_POLICY=PASSIVE NUMBA_CACHE_DIR=/tmp/numba
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
WORKDIR /opt/ouroboros3d
COPY . .
RUN pip install ".[app]"
# Not root, so that nothing but the mounted folder and /tmp can be written.
RUN useradd --create-home user
USER user
WORKDIR /data
ENTRYPOINT ["ouroboros3d"]
CMD ["--help"]
