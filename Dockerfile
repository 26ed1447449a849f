# A CPU image with every extra of the tests, which runs the demo:
#   docker build -t fulgurite . && docker run --name demo fulgurite
#   docker cp demo:/opt/fulgurite/compare_results . && docker cp demo:/opt/fulgurite/runs .
# or any command on your files: docker run --rm -v "$PWD:/data" -w /data fulgurite fulgurite systems
# For GPUs take an image of PyTorch with CUDA, and `pip install` fulgurite there.
FROM python:3.13-slim
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
# PyTorch's CPU builds; of torch 2.13.0 pip prefers the one with a local version (+cpu).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PATH=/opt/fulgurite/.venv/bin:$PATH
WORKDIR /opt/fulgurite
COPY . .
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX make venv
CMD ["make", "demo"]
