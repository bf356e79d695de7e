# Inference and training on NVIDIA GPUs; gsplat compiles its kernels on first use, which needs the -devel image.
# Not built by the project's tests: no container engine and no GPU were at hand.
#
#   docker build -f scripts/docker/cuda.Dockerfile -t ouroboros3d:cuda .
#   docker run --rm --gpus all -v "$PWD:/data" ouroboros3d:cuda infer --device cuda --ckpt /data/checkpoint \
#     --config configs/baseline.yaml --input_img /data/photo.png --output_dir /data/outputs
FROM nvidia/cuda:12.6.3-devel-ubuntu24.04

ENV PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive TORCH_EXTENSIONS_DIR=/tmp/torch_extensions
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv git \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126
WORKDIR /opt/ouroboros3d
COPY . .
RUN pip install ".[app,data]" ninja
RUN useradd --create-home user
USER user
WORKDIR /data
ENTRYPOINT ["ouroboros3d"]
CMD ["--help"]
