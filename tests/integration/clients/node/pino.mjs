// node pino.mjs PORT COUNT PAUSE BAD: COUNT records, one each PAUSE ms, the one numbered BAD malformed.
import { pino } from 'pino';
import send from 'pino-http-send';

const [port, count, pause, bad] = process.argv.slice(2).map(Number);
const stream = send.createWriteStream({
  url: `http://127.0.0.1:${port}/ingest/pino`, batchSize: 20, timeout: 500, retries: 60, interval: 1000,
});
const logger = pino({ name: 'pino' }, stream);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
for (let n = 0; n < count; n++) {
  logger.info(n === bad ? { n, time: 'never' } : { n }, 'record');
  await sleep(pause);
}
