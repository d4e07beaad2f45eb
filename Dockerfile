# The server and the web page, on a CPU:  docker build -t openbagel .
# On NVIDIA's cards:  docker build -t openbagel --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# (PyTorch's CUDA builds bring CUDA with them; the host needs the driver and NVIDIA's container toolkit.)
# BASE may be any image with Python 3.11 or newer and pip.
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,ui
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /build

# What changes least comes first: torch, alone, so that TORCH_INDEX rules it and nothing else; what openbagel
# needs, of which an empty package tells; openbagel.
COPY constraints.txt ./
RUN pip install --no-deps --index-url "${TORCH_INDEX}" "$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)"
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY openbagel/__init__.py openbagel/
RUN pip install -c constraints.txt ".[${EXTRAS}]"
COPY openbagel openbagel/
RUN pip install --no-deps --force-reinstall .

# Checkpoints are kept in /models: mount a volume there.
RUN useradd --create-home --uid 1000 openbagel && install -d -o openbagel /models
ENV HF_HOME=/models NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER openbagel
WORKDIR /home/openbagel

EXPOSE 8000 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# A public address needs a key: docker run -e OPENBAGEL_API_KEY=... -p 8000:8000 openbagel
ENTRYPOINT ["openbagel"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
