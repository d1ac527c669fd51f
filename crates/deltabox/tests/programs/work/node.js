// A server with clients that keep their connections, and threads that compute; spoken to line by line.
'use strict';
const http = require('http');
const { Worker } = require('worker_threads');
const crypto = require('crypto');
const readline = require('readline');

const digest = (n) => crypto.createHash('sha256').update(String(n).repeat(500)).digest('hex');
let token = '0';
let failure = null;
const counts = { answers: 0, digests: 0 };
const fail = (what) => { failure = failure || what; };

const server = http.createServer((request, response) => {
  if (request.url.startsWith('/set/')) token = request.url.slice(5);
  response.end(request.url === '/token' ? token : request.url);
});

function fetch(agent, path) {
  return new Promise((resolve, reject) => {
    const request = http.get({ port: 8080, host: '127.0.0.1', path, agent }, (response) => {
      let body = '';
      response.on('data', (part) => { body += part; });
      response.on('end', () => resolve(body));
    });
    request.on('error', reject);
  });
}

async function client(name) {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  for (let n = 0; ; n++) {
    const path = `/echo/${name}/${n}`;
    const body = await fetch(agent, path);
    if (body !== path) fail(`${body} instead of ${path}`);
    counts.answers++;
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

const WORKER = `
const { parentPort } = require('worker_threads');
const crypto = require('crypto');
const digest = (n) => crypto.createHash('sha256').update(String(n).repeat(500)).digest('hex');
parentPort.on('message', (n) => parentPort.postMessage([n, digest(n)]));`;

function work() {
  const worker = new Worker(WORKER, { eval: true });
  worker.on('error', (error) => fail(`a worker: ${error.stack}`));
  worker.on('message', ([n, got]) => {
    if (got !== digest(n)) fail(`digest of ${n}`);
    counts.digests++;
    worker.postMessage(n + 1);
  });
  worker.postMessage(0);
}

async function goesOn() {
  const before = { ...counts };
  while (!failure && (counts.answers < before.answers + 5 || counts.digests < before.digests + 5)) {
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

async function answer(line) {
  const agent = new http.Agent({ keepAlive: false });
  const [command, argument] = line.split(' ');
  if (command === 'set') await fetch(agent, `/set/${argument}`);
  if (command === 'go') await goesOn();
  if (failure) return `BAD ${failure}`;
  return command === 'get' ? fetch(agent, '/token') : 'done';
}

server.keepAliveTimeout = 0;
server.listen(8080, '127.0.0.1', () => {
  for (let i = 0; i < 5; i++) client(i).catch((error) => fail(`a client: ${error.stack}`));
  work();
  work();
  console.log('ready');
  readline.createInterface({ input: process.stdin }).on('line', async (line) => console.log(await answer(line)));
});
